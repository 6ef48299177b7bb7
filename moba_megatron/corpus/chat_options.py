"""The `chat` section of a recipe: what a chat template gets beside the messages."""

from __future__ import annotations

from datetime import date, datetime
from typing import Annotated, Any

from pydantic import BeforeValidator, field_validator

from moba_megatron.config import Section

# What `apply_chat_template` is called with.
TAKEN = {"messages", "conversation", "tools", "documents", "chat_template", "tokenize", "add_generation_prompt"}
TAKEN |= {"strftime_now", "continue_final_message", "return_assistant_tokens_mask", "return_dict", "return_tensors"}
TAKEN |= {"padding", "truncation", "max_length", "tokenizer_kwargs", "sanitize_control_tokens"}


def _iso(value: Any) -> Any:
    """YAML makes a date of what looks like one."""
    return value.isoformat() if isinstance(value, date) else value


class Chat(Section):
    """Inputs of the chat template besides the messages."""

    template_arguments: dict[str, Any] = {}
    """Variables that the template reads, such as `{enable_thinking: false}` or `{date_string: 26 Jul 2024}`."""
    now: Annotated[str | None, BeforeValidator(_iso)] = None
    """The time (ISO 8601, such as 2024-07-26) that a template gets where it asks for the time of day
    (`strftime_now`). Without it, such a template is refused: data must not depend on the day they are prepared."""

    @field_validator("now")
    @classmethod
    def _is_a_time(cls, value: str | None) -> str | None:
        if value is not None:
            datetime.fromisoformat(value)
        return value

    @field_validator("template_arguments")
    @classmethod
    def _are_free(cls, value: dict[str, Any]) -> dict[str, Any]:
        taken = sorted(TAKEN & value.keys())
        if taken:
            raise ValueError(f"{', '.join(taken)} cannot be set: `prepare` passes it to the template")
        return value
