"""Every configuration key is read somewhere: no flag without effect."""

import re
from pathlib import Path

import pytest
from pydantic import BaseModel

from mmscale.config import schema

PACKAGE = Path(__file__).parents[2] / "mmscale"
SECTIONS = [
    c
    for c in vars(schema).values()
    if isinstance(c, type) and issubclass(c, BaseModel) and c.__module__ == schema.__name__
]
KEYS = sorted({(c.__name__, name) for c in SECTIONS for name in c.model_fields})
CODE = "\n".join(p.read_text() for p in PACKAGE.rglob("*.py") if p.name not in ("schema.py", "reference.py"))


def test_there_are_keys():
    assert len(KEYS) > 60


@pytest.mark.parametrize(("section", "key"), KEYS)
def test_key_is_read(section, key):
    by_attribute = re.search(rf"\.{key}\b", CODE)
    by_name = re.search(rf"[\"']{key}[\"']", CODE) or re.search(rf"for name, \w+ in (train|self)\.{key}", CODE)
    assert by_attribute or by_name, f"{section}.{key} is never read"


def test_the_check_can_fail():
    assert not re.search(r"\.no_such_key_anywhere\b", CODE)
