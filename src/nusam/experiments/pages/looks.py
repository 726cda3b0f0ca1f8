"""How the methods' lines are told apart, in pictures and on the page."""

from nusam.experiments.training.methods import METHODS

__all__ = ["LOOKS", "LOOK_OF"]

# Okabe and Ito's colours and distinct dashes, told apart by every kind of colour vision and in grey.
LOOKS = {
    "adamw": ("#000000", (0, (1, 1))),
    "sam": ("#E69F00", (0, (5, 1.5))),
    "sam-on": ("#009E73", (0, (4, 1.5, 1, 1.5))),
    "nusam": ("#0072B2", "solid"),
}
LOOK_OF = {  # by the label of a line
    **{METHODS[name].title: look for name, look in LOOKS.items()},
    "AdamW, best epoch": ("#7F7F7F", (0, (1, 1))),
    "νSAM at 1/8": ("#CC79A7", (0, (8, 2))),
}
