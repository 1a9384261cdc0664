# SPDX-License-Identifier: Apache-2.0
"""Which modules a configuration targets: compiled matchers for targets, exclusions, layer ranges and rank/alpha
patterns.

A list of names costs one set lookup for each dotted suffix of a module's name, however many names there are.
"""

import functools
import re
from collections.abc import Collection, Iterable, Iterator
from typing import Any

from ..config import nearest

DUMMY_TARGET_MODULES = "dummy-target-modules"
MIN_TARGET_MODULES_FOR_OPTIMIZATION = 20
ALL_LINEAR = "all-linear"
_LAYER_INDEX = re.compile(r".*?\.[^.]*\.(\d+)\.")


class ExcludedModule:
    """Falsy marker: the module was excluded, not merely unmatched."""

    def __bool__(self) -> bool:
        return False


EXCLUDED = ExcludedModule()


def suffixes(key: str) -> Iterator[str]:
    """ "a.b.c" -> "a.b.c", "b.c", "c"."""
    yield key
    start = key.find(".")
    while start >= 0:
        yield key[start + 1 :]
        start = key.find(".", start + 1)


class Names:
    """A list of names (exact or dotted suffix) or one regex (fullmatch), with a count of hits for each entry."""

    def __init__(self, names: str | Collection[str] | None):
        self.regex = re.compile(names) if isinstance(names, str) else None
        self.entries = frozenset() if names is None or isinstance(names, str) else frozenset(names)
        self.hits: dict[str, int] = {names: 0} if isinstance(names, str) else dict.fromkeys(sorted(self.entries), 0)

    def match(self, key: str) -> Any:
        """A re.Match, the entry that matched, or None."""
        if self.regex is not None:
            return self.regex.fullmatch(key)
        if not self.entries:
            return None
        return next((s for s in suffixes(key) if s in self.entries), None)

    def count(self, hit: Any) -> None:
        name = hit if isinstance(hit, str) else self.regex.pattern if self.regex else None
        if name is not None:
            self.hits[name] += 1

    @property
    def unmatched(self) -> list[str]:
        lost = [name for name, hits in self.hits.items() if hits == 0]
        if not lost:
            return lost
        # a shorter name for a module that was found under a longer one is no mistake
        found = {s for name, hits in self.hits.items() if hits for s in suffixes(name)}
        return [name for name in lost if name not in found]


class Matcher:
    """Answers for one configuration whether a module is targeted; see `match`."""

    def __init__(self, config: Any):
        self.targets = Names(config.target_modules)
        if config.target_modules is None and not getattr(config, "target_parameters", None):
            raise TypeError(f"{type(config).__name__} has neither target_modules nor target_parameters.")
        excluded = getattr(config, "exclude_modules", None)
        self.excluded = Names(excluded) if excluded else None
        saved = getattr(config, "modules_to_save", None)
        self.saved = re.compile("|".join(rf"(?:^|.*\.)(?:{m})(?:$|\..*)" for m in saved)) if saved else None
        layers, patterns = getattr(config, "layers_to_transform", None), getattr(config, "layers_pattern", None) or ()
        self.layers = {layers} if isinstance(layers, int) else layers or None
        patterns = [patterns] if isinstance(patterns, str) else patterns
        self.patterns = [re.compile(rf"(?:^|.*?\.){p}\.(\d+)\.") for p in patterns] or [_LAYER_INDEX]

    def match(self, key: str) -> Any:
        """Truthy when `key` is targeted, EXCLUDED when it is excluded, else None or False.

        A name that equals the whole key is not subject to the layer filters.
        """
        if self.excluded is not None and (hit := self.excluded.match(key)):
            self.excluded.count(hit)
            return EXCLUDED
        if self.saved is not None and self.saved.match(key):
            return EXCLUDED
        hit = self.targets.match(key)
        if not hit:
            return None
        if isinstance(hit, str) and hit != key and self.layers is not None and not self._in_layers(key):
            return False
        self.targets.count(hit)
        return hit if self.targets.regex else True

    def _in_layers(self, key: str) -> bool:
        found = next((m for p in self.patterns if (m := p.match(key))), None)
        return found is not None and int(found.group(1)) in (self.layers or ())


def check_target_module_exists(config: Any, key: str) -> Any:
    """Whether the module called `key` is targeted by `config` (published helper; injection compiles a Matcher once)."""
    return Matcher(config).match(key)


def match_target_against_key(target_pattern: str, key: str) -> re.Match[str] | None:
    return re.fullmatch(target_pattern, key)


# ---- patterns: {name or regex: value}
@functools.lru_cache(maxsize=256)
def _compiled(keys: tuple[str, ...]) -> tuple[tuple[str, re.Pattern[str]], ...]:
    return tuple((k, re.compile(rf"(.*\.)?({k})$")) for k in keys)


def get_pattern_key(pattern_keys: Iterable[str], key_to_match: str) -> str:
    """The first pattern that matches the end of the key at a dot boundary; the key itself when none does."""
    return next((k for k, p in _compiled(tuple(pattern_keys)) if p.match(key_to_match)), key_to_match)


def pattern_value(patterns: dict[str, Any] | None, key: str, default: Any) -> Any:
    """The value that a rank/alpha pattern gives for the module called `key`."""
    if not patterns:
        return default
    return patterns.get(get_pattern_key(patterns, key), default)


def dotted_value(patterns: dict[str, Any] | None, key: str, default: Any) -> Any:
    """The same by the rule of C3A and FourierFT: a pattern begins after a dot; a whole name counts after the others."""
    patterns = patterns or {}
    return patterns.get(next((p for p in patterns if re.match(rf".*\.{p}$", key)), key), default)


def unmatched_patterns(patterns: dict[str, Any] | None, keys: Iterable[str]) -> list[str]:
    """Pattern keys that apply to none of the module keys."""
    if not patterns:
        return []
    compiled = _compiled(tuple(patterns))
    keys = list(keys)
    return [k for k, p in compiled if not any(p.match(key) for key in keys)]


def find_minimal_target_modules(targets: Collection[str], others: Collection[str]) -> set[str]:
    """The smallest set of dotted suffixes that selects `targets` and none of `others`."""
    if isinstance(targets, str) or not targets:
        raise ValueError("target_modules should be a list or set of strings, and not empty.")
    targets, others = set(targets), set(others)
    if "" in targets:
        raise ValueError("target_modules should not contain an empty string.")
    if common := targets & others:
        raise ValueError(f"target_modules and other_module_names contain common elements: {sorted(common)[:5]}.")
    taken = {s for other in others for s in suffixes(other)}
    required: set[str] = set()
    for target in sorted(targets, key=lambda t: t.split(".")[::-1]):
        parts = list(suffixes(target))
        if any(s in required for s in parts):
            continue
        required.add(next((s for s in reversed(parts) if s not in taken), target))
    return required


def suggestions(names: Iterable[str], keys: Collection[str]) -> str:
    """One line of near matches for target names that hit nothing."""
    leaves = {s for key in keys for s in suffixes(key) if s.count(".") <= 1}
    lines = [f"{n!r}:{hint}" for n in names if n not in leaves and (hint := nearest(n, leaves, " nearest "))]
    return "; ".join(lines)
