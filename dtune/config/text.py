"""What the text of a config may be: one mapping of plain values, read before anything is built."""

from __future__ import annotations

import yaml

from dtune.errors import ConfigError

# Of dtune's own tree there are three.
_DEEPEST = 20


def check_text(text: str) -> None:
    """Raise ConfigError for text that is no YAML mapping, or has tags, aliases or deep nesting.

    Tags build objects, and aliases let a short text become a huge one.
    """
    depth = 0
    try:
        for event in yaml.parse(text, yaml.SafeLoader):
            if isinstance(event, yaml.AliasEvent):
                raise _refused(event, "an alias; write the value itself")
            if not isinstance(event, yaml.NodeEvent):
                depth -= isinstance(event, yaml.CollectionEndEvent)
                continue
            if not depth and not isinstance(event, yaml.MappingStartEvent):
                raise ConfigError("the config is not a mapping of keys to values")
            if isinstance(event, yaml.ScalarEvent | yaml.CollectionStartEvent) and event.tag:
                raise _refused(event, f"the tag {event.tag}; write a plain value")
            depth += isinstance(event, yaml.CollectionStartEvent)
            if depth > _DEEPEST:
                raise _refused(event, f"nesting deeper than {_DEEPEST}")
    except yaml.YAMLError as error:
        raise ConfigError(f"the config is not YAML: {error}") from error


def _refused(event: yaml.Event, what: str) -> ConfigError:
    line = event.start_mark.line + 1 if event.start_mark else 0
    return ConfigError(f"the config has, in line {line}, {what}")
