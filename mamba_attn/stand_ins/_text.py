"""What mamba_ssm's language models need of the package transformers; vision models only import it."""

from typing import Any, NoReturn


class GenerationMixin:
    """Base class of mamba_ssm's language models; text is not generated here."""

    def generate(self, *arguments: Any, **options: Any) -> NoReturn:
        """Refuse."""
        _no_text("GenerationMixin.generate")


class InferenceParams:
    """Cache of mamba_ssm's language models; refused.

    Args:
        arguments: ignored.
        options: ignored.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        _no_text("InferenceParams")


def load_config_hf(*arguments: Any, **options: Any) -> NoReturn:
    """Refuse."""
    _no_text("load_config_hf")


def load_state_dict_hf(*arguments: Any, **options: Any) -> NoReturn:
    """Refuse."""
    _no_text("load_state_dict_hf")


def _no_text(name: str) -> NoReturn:
    raise NotImplementedError(
        f"mamba_ssm's {name} needs the package transformers, which could not be imported when "
        "mamba_attn.cpu_stand_ins() stood in for it; it serves language models only."
    )
