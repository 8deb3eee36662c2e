"""Every configuration key is named in the code that is not the schema.

A search for names: it finds a key that nobody took up, and cannot tell one `path` from another. That a key has its effect is shown
by the test of the part that reads it.
"""

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
    by_name = re.search(rf"[\"']{key}[\"']", CODE)
    assert by_attribute or by_name, f"{section}.{key} is never read"


def test_the_check_can_fail():
    assert not re.search(r"\.no_such_key_anywhere\b", CODE)
