"""Documents of the task `python_lines` for lm-eval: a line of Python is cut, and one of three endings is its own."""

from typing import Any

from datasets import Dataset

LINES = (
    ("if not isinstance(value, ", "str):\n", "is None)\n", "return\n"),
    ("for index, item in enumerate(", "items):\n", "import os\n", "else:\n"),
    ('    raise ValueError("', 'expected a string")\n', "for x in y:\n", "def __init__(\n"),
    ("from collections import ", "namedtuple\n", "0.5 * self\n", "lambda: None)\n"),
    ("with open(filename, ", "'rb') as f:\n", "break\n", "class:\n"),
    ("    def __init__(self, ", "name):\n", "'%s' % x\n", "return None\n"),
    ("        self.name = ", "name\n", "def\n", "import re\n"),
    ("import os\nimport ", "sys\n", "self\n", "None\n"),
    ("try:\n    value = int(text)\nexcept ", "ValueError:\n", "in range(10)\n", "while x\n"),
    ("while True:\n    line = file.", "readline()\n", "elif:\n", "(self)\n"),
    ("    if key in ", "self._cache:\n", "return key\n", "def key:\n"),
    ('if __name__ == "', '__main__":\n', "import sys\n", "self.x\n"),
    ("    return ", "result\n", "def run(\n", "except:\n"),
    ("        if self.closed:\n            raise ", "ValueError(\n", "pass\n", "import\n"),
    ("class Error(", "Exception):\n", "self.x = 1\n", "not in\n"),
    ("    @property\n    def ", "name(self):\n", "0:\n", "return self\n"),
    ("assert len(args) == ", "2\n", "def\n", "pass:\n"),
    ("    for key, value in ", "kwargs.items():\n", "raise\n", "== None\n"),
    ("    try:\n        yield\n    ", "finally:\n", "self.\n", "range(3)\n"),
    ("x = [i for i in ", "range(10)]\n", "import x\n", "def i]\n"),
    ("    global ", "_cache\n", "1 + 2\n", "if x:\n"),
    ("def _main():\n    import ", "argparse\n", "True\n", "[0]\n"),
    ("        else:\n            ", "return None\n", "elif x\n", "):\n"),
    ("    self.assertEqual(", "result, expected)\n", "def test\n", "while\n"),
)
"""What a line begins with, how it goes on, and how two others do."""


def documents(**_: Any) -> dict[str, Dataset]:
    """The splits that lm-eval asks for. The right ending stands first, second and third in turn."""
    docs = []
    for number, (start, *endings) in enumerate(LINES):
        right = number % 3
        docs.append({"start": start, "endings": endings[3 - right :] + endings[: 3 - right], "right": right})
    return {"test": Dataset.from_list(docs)}
