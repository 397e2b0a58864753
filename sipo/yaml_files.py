"""Reads YAML: any file is accepted or refused quickly, and no message prints its content."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from sipo.files import FileError, check_regular, one_line, read_text

_MOST_BYTES = 1 << 20  # of a file: the parser takes seconds for a megabyte
_MOST_VALUES = 20_000  # in a file, with aliases written out
_DEEPEST = 64  # levels
_LONGEST = 200  # letters of the parser's own message
_BOOLEAN = "tag:yaml.org,2002:bool"


def read_yaml(path: Path) -> Any:
    """Reads a YAML file.

    Raises:
        FileNotFoundError: it does not exist.
        FileError: it cannot be read, or is not YAML, in one line that names it.
    """
    size = check_regular(path).st_size
    if size > _MOST_BYTES:
        raise FileError(f"{path}: has {size} bytes, expected at most {_MOST_BYTES} of a configuration")
    return parse_yaml(read_text(path), path)


def parse_yaml(text: str, where: object) -> Any:
    """Parses YAML with version 1.2's booleans, true and false: "off" and "no" are words, as some keys take them.

    Args:
        text: to parse.
        where: named in the error.

    Raises:
        FileError: it is not YAML, is nested too deeply, holds a number of thousands of digits, or aliases that
            multiply; or a mapping has a key twice.
    """
    import yaml

    many = FileError(f"{where}: holds more than {_MOST_VALUES} values, expected a configuration")
    itself = FileError(f"{where}: not YAML: a value refers to itself, expected a configuration")
    deep = FileError(f"{where}: nested too deeply, expected YAML of at most {_DEEPEST} levels")

    class Loader(yaml.SafeLoader):
        count = depth = 0

        def compose_node(self, parent: Any, index: Any) -> Any:
            self.count, self.depth = self.count + 1, self.depth + 1
            if self.count > _MOST_VALUES or self.depth > _DEEPEST:
                raise deep if self.depth > _DEEPEST else many
            node = super().compose_node(parent, index)
            self.depth -= 1
            return node

        def compose_mapping_node(self, anchor: Any) -> Any:
            node = super().compose_mapping_node(anchor)
            keys = set()
            for key, _ in node.value:
                if not isinstance(key, yaml.ScalarNode):
                    continue
                name = (key.tag, key.value)
                if name in keys:  # PyYAML would take the last one
                    place = f"line {key.start_mark.line + 1}"
                    raise FileError(f"{where}: not YAML: a key stands twice in one mapping, {place}")
                keys.add(name)
            return node

    Loader.yaml_implicit_resolvers = {
        first: [resolver for resolver in resolvers if resolver[0] != _BOOLEAN]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    Loader.add_implicit_resolver(_BOOLEAN, re.compile("^(true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
    try:
        loader = Loader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            # Before any value is made of it: merged mappings are copied, and so is much of a tree later.
            if _holds_itself(node, set(), set()):
                raise itself
            if _values(node, {}) > _MOST_VALUES:
                raise many
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except RecursionError as error:  # of a chain of aliases
        raise deep from error
    except yaml.MarkedYAMLError as error:  # without the mark's excerpt of the text
        place = f", line {error.problem_mark.line + 1}" if error.problem_mark is not None else ""
        problem = one_line(f"{error.context}: {error.problem}" if error.context else str(error.problem), _LONGEST)
        raise FileError(f"{where}: not YAML: {problem}{place}") from error
    except FileError:
        raise
    except (yaml.YAMLError, ValueError, OverflowError, MemoryError) as error:  # numbers and dates as well
        problem = "a number of thousands of digits" if "int_max_str_digits" in str(error) else one_line(error, _LONGEST)
        raise FileError(f"{where}: not YAML: {problem}") from error
    except Exception as error:  # PyYAML makes values of tagged text without looking at it: KeyError, IndexError
        problem = f"a value that does not fit its tag ({type(error).__name__}: {one_line(error, _LONGEST)})"
        raise FileError(f"{where}: not YAML: {problem}") from error


def _holds_itself(node: Any, above: set[int], sound: set[int]) -> bool:
    """Whether a node is below itself, by an alias."""
    if id(node) in above:
        return True
    if id(node) in sound or not isinstance(node.value, list):
        return False
    flat = (child for item in node.value for child in (item if isinstance(item, tuple) else (item,)))
    if any(_holds_itself(child, above | {id(node)}, sound) for child in flat):
        return True
    sound.add(id(node))
    return False


def _values(node: Any, known: dict[int, int]) -> int:
    """Counts a node's values, with aliases written out; more than allowed if it contains itself."""
    if id(node) not in known:
        known[id(node)] = _MOST_VALUES + 1  # until it is counted
        children = node.value if isinstance(node.value, list) else []
        flat = (child for item in children for child in (item if isinstance(item, tuple) else (item,)))
        known[id(node)] = 1 + sum(_values(child, known) for child in flat)
    return known[id(node)]
