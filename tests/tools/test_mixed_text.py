"""The text of the placement study: markup goes, words stay, long texts are cut between their pieces."""

from hypothesis import given
from hypothesis import strategies as st

from occult_train.tools.bench.mixed_text import chunks, glosses, page_text


def test_pages_keep_their_words_alone() -> None:
    page = (
        "<html><head><style>p {x}</style><script>f()</script></head><body><p>One &amp; <b>two</b></p>\n</body></html>"
    )
    assert page_text(page) == "One & two\n"


def test_synsets_become_words_and_meaning() -> None:
    """Two words (02 in hexadecimal), underscores between parts of a word; the licence at the top is no synset."""
    lines = [
        "  1 This software | and database\n",
        "00002137 03 n 02 abstraction 0 abstract_entity 0 010 @ 00001740 n 0000 | a general concept  \n",
    ]
    assert list(glosses(lines)) == ["abstraction, abstract entity: a general concept\n"]


@given(st.lists(st.text(max_size=9)), st.integers(1, 20))
def test_chunks_lose_nothing_and_are_long_enough(pieces: list[str], size: int) -> None:
    made = list(chunks(pieces, size))
    assert "".join(made) == "".join(pieces)
    assert all(len(chunk) >= size for chunk in made[:-1])
