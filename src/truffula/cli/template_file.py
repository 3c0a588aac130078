"""The operator's chat template, looked at before anything is loaded."""

from __future__ import annotations

from pathlib import Path

from truffula.errors import ConfigError, TemplateError


def check_template(path: Path) -> None:
    """Raise ``ConfigError`` where the file cannot be read as text, or is not valid Jinja."""
    from truffula.text.chat_template import ChatTemplates

    try:
        source = path.read_text(encoding="utf-8")
        ChatTemplates({"default": source}, {}).compile(source)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"The chat template {path} cannot be read: {error}.", param="chat_template") from error
    except TemplateError as error:
        raise ConfigError(f"{path}: {error.message}", param="chat_template") from error
