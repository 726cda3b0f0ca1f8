"""How the methods' lines are told apart, in pictures and on the page."""

__all__ = ["LOOKS"]

# Okabe and Ito's colours and distinct dashes, told apart by every kind of colour vision and in grey.
LOOKS = {
    "adamw": ("#000000", (0, (1, 1))),
    "sam": ("#E69F00", (0, (5, 1.5))),
    "sam-on": ("#009E73", (0, (4, 1.5, 1, 1.5))),
    "nusam": ("#0072B2", "solid"),
}
