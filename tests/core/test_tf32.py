"""The user's choice of TF32 is read and put back, by whichever of torch's switches it was made."""

import pytest
import torch

from mamba_attn.core.tf32 import tf32_allowed, without_tf32

NEW = hasattr(torch.backends.cuda.matmul, "fp32_precision")


@pytest.mark.skipif(not NEW, reason="torch before 2.9")
@pytest.mark.parametrize("owner", [torch.backends.cuda.matmul, getattr(torch.backends.cudnn, "conv", None)])
def test_a_choice_is_put_back_and_other_choices_are_no_obstacle(owner):
    before = owner.fp32_precision
    try:
        owner.fp32_precision = "tf32"  # from now on the older switches may not be read
        assert tf32_allowed()
        with without_tf32():
            assert not tf32_allowed()
        assert owner.fp32_precision == "tf32"
        with pytest.raises(ZeroDivisionError), without_tf32():
            1 / 0  # noqa: B018
        assert owner.fp32_precision == "tf32"
    finally:
        owner.fp32_precision = before
