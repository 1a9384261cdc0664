"""Text to typed options."""

import enum
from dataclasses import dataclass, field
from typing import Literal, Optional, Union

import pytest

from peft.cli.errors import CliError
from peft.cli.options import config_class, parse_assignments, settable_fields


class Kind(str, enum.Enum):
    RANDOM = "RANDOM"
    TEXT = "TEXT"


@dataclass
class Inner:
    rho: float = 2.0


@dataclass
class Options:
    peft_type: str | None = None
    r: int = 8
    rate: float = 0.0
    flag: bool = False
    names: Optional[Union[list[str], str]] = None  # noqa: UP007, UP045  # the old form must work too
    layers: list[int] | int | None = None
    init: bool | Literal["gaussian", "pissa_niter_[number of iters]", "eva"] = True
    kind: Kind = Kind.RANDOM
    pattern: dict[str, int] = field(default_factory=dict)
    inner: Inner | None = None
    text: str | None = None


@pytest.mark.parametrize(
    ("pair", "value"),
    [
        ("r=4", 4),
        ("rate=1e-3", 1e-3),
        ("flag=true", True),
        ("flag=0", False),
        ("names=q_proj,v_proj", ["q_proj", "v_proj"]),
        ("names=all-linear", "all-linear"),
        ("names=q_proj", ["q_proj"]),
        ("names=.*[qv]_proj", ".*[qv]_proj"),
        ("names=none", None),
        ('names=["a.b"]', ["a.b"]),
        ("layers=3", 3),
        ("layers=0,1,2", [0, 1, 2]),
        ("init=gaussian", "gaussian"),
        ("init=false", False),
        ("init=pissa_niter_4", "pissa_niter_4"),
        ("kind=text", Kind.TEXT),
        ('pattern={"q_proj": 2}', {"q_proj": 2}),
        ('inner={"rho": 3}', Inner(3)),
        ("text=a=b", "a=b"),
        ("text=none", None),
    ],
)
def test_values(pair, value):
    assert list(parse_assignments(Options, [pair]).values()) == [value]


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        ("rr=4", "no option 'rr', did you mean 'r'"),
        ("layer=3", "did you mean 'layers'?"),
        ("r=four", "expected a whole number"),
        ("r=1.5", "expected a whole number"),
        ("flag=maybe", "expected true or false"),
        ("kind=other", "expected one of RANDOM, TEXT"),
        ("init=other", "gaussian"),
        ("pattern=[1]", "expected a JSON object"),
        ("pattern={", "not valid JSON"),
        ('inner={"rhoo": 1}', "did you mean 'rho'?"),
        ("peft_type=LORA", "no option 'peft_type'"),
        ("r", "expected key=value"),
    ],
)
def test_errors(pair, message):
    with pytest.raises(CliError, match="--set") as error:
        parse_assignments(Options, [pair])
    assert message in str(error.value)


def test_every_registered_config_can_be_read():
    from peft import PEFT_TYPE_TO_CONFIG_MAPPING

    for cls in PEFT_TYPE_TO_CONFIG_MAPPING.values():
        fields = settable_fields(cls)
        assert "task_type" in fields and "inference_mode" not in fields


def test_real_lora_config():
    cls = config_class("LoRA")
    values = parse_assignments(
        cls, ["r=4", "lora-alpha=16", "target_modules=q_proj,v_proj", "init_lora_weights=gaussian", "use_dora=true"]
    )
    config = cls(**values)
    assert (config.r, config.lora_alpha, set(config.target_modules)) == (4, 16, {"q_proj", "v_proj"})
    assert config.init_lora_weights == "gaussian" and config.use_dora is True
