"""The page of methods says what the classes do."""

import nusam
from tests.docs import methods


def test_the_table_is_that_of_the_classes():
    text = methods.PAGE.read_text("utf-8")
    assert methods.page(text) == text


def test_every_method_is_in_the_table():
    kinds = [getattr(nusam, name) for name in nusam.__all__]
    kinds = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, nusam.SharpnessAware)]
    assert set(methods.METHODS) == {*kinds} - {nusam.SharpnessAware}
