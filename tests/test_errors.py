"""The kinds of error, and the sentence that helps after a misspelt name."""

import inspect

import pytest

from mamba_attn import errors

KINDS = [
    value for value in vars(errors).values() if inspect.isclass(value) and issubclass(value, errors.MambaAttnError)
]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_kind_is_caught_by_the_base_and_prints_its_sentence(kind):
    with pytest.raises(errors.MambaAttnError, match=r"^trace: say this, as it is: 'x'$") as caught:
        raise kind("trace: say this, as it is: 'x'")
    assert isinstance(caught.value, RuntimeError)
    assert str(caught.value) == "trace: say this, as it is: 'x'"
    assert kind.__doc__


def test_an_unknown_layer_is_a_key_error_with_a_readable_sentence():
    with pytest.raises(KeyError) as caught:
        raise errors.UnknownLayerError("no layer 'x'\nKnown: 'y'.")
    assert str(caught.value) == "no layer 'x'\nKnown: 'y'."


def test_there_are_few_kinds():
    assert len(KINDS) <= 10


@pytest.mark.parametrize(
    ("name", "names", "sentence"),
    [
        ("layers.6.mixr", ["layers.5.mixer", "layers.6.mixer", "head"], "Did you mean 'layers.6.mixer' or "),
        ("vim_tny", ["vim_tiny", "vmamba_base"], "Did you mean 'vim_tiny'?"),
        ("x", ["vim_tiny", "vim_small"], "Known: 'vim_tiny', 'vim_small'."),
        ("x", (str(number) for number in range(40)), "'38', '39'."),
        ("x", (str(number) for number in range(41)), "'38', '39', ...."),
        ("x", [], "Known: ."),
    ],
)
def test_nearest(name, names, sentence):
    assert sentence in errors.nearest(name, names)
