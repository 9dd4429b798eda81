"""The tasks: the paper's twelve data sets (arXiv 2507.00994), and sets out of Python packages for studies on any machine."""

from dataclasses import dataclass
from typing import Literal

from megatron_ext.errors import UserError

Family = Literal["sc", "tc", "qa", "ir"]
FAMILIES: dict[str, str] = {
    "sc": "sequence classification",
    "tc": "token classification",
    "qa": "extractive question answering",
    "ir": "retrieval",
}
METRICS: dict[str, str] = {"sc": "accuracy", "tc": "entity F1", "qa": "answer F1", "ir": "NDCG@10"}


@dataclass(frozen=True, kw_only=True)
class HubSource:
    """A data set as `datasets.load_dataset` finds it, and how its columns are called here."""

    path: str
    name: str | None = None
    train: str = "train"
    validation: str | None = None
    """None: cut from the training split, since the validation split is what is tested on."""
    test: str = "validation"
    columns: tuple[tuple[str, str], ...] = ()
    """(name here, name there); none leaves all as they are."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """One data set."""

    name: str
    family: Family
    hub: HubSource | None = None
    """None: the set is that of `tools/fetch_demo_data.py`."""
    trained_on: str | None = None
    """A transfer: fine-tuned on this task's training split, and on none of its own."""
    max_length: int = 512
    """Tokens of an example; longer ones are cut, in question answering into overlapping windows."""

    @property
    def metric(self) -> str:
        """What is reported, between 0 and 1."""
        return METRICS[self.family]


def _glue(name: str, first: str, second: str | None = None, validation: str = "validation") -> Task:
    pair = (("text_pair", second),) if second else ()
    hub = HubSource(path="nyu-mll/glue", name=name, test=validation, columns=(("text", first), *pair, ("label", "label")))
    return Task(name=name, family="sc", hub=hub)


def _tagged(name: str, path: str, config: str | None, tags: str) -> Task:
    hub = HubSource(path=path, name=config, validation="validation", test="test", columns=(("tokens", "tokens"), ("tags", tags)))
    return Task(name=name, family="tc", hub=hub)


def _questions(name: str, path: str, config: str | None = None) -> Task:
    columns = tuple((column, column) for column in ("question", "context", "answers"))
    return Task(name=name, family="qa", hub=HubSource(path=path, name=config, columns=columns))


PAPER = (
    _glue("sst2", "sentence"),
    _glue("mnli", "premise", "hypothesis", "validation_matched"),
    _glue("qqp", "question1", "question2"),
    _tagged("conll2003", "eriktks/conll2003", None, "ner_tags"),
    _tagged("ontonotes", "tner/ontonotes5", None, "tags"),
    _tagged("uner", "universalner/universal_ner", "en_ewt", "ner_tags"),
    _questions("squad", "rajpurkar/squad"),
    _questions("squad_v2", "rajpurkar/squad_v2"),
    _questions("record", "super_glue", "record"),
    Task(
        name="msmarco",
        family="ir",
        hub=HubSource(path="sentence-transformers/msmarco-corpus", columns=(("query", "query"), ("positive", "positive"))),
    ),
    Task(name="nq", family="ir", hub=HubSource(path="BeIR/nq"), trained_on="msmarco"),
    Task(name="mldr_en", family="ir", hub=HubSource(path="Shitao/MLDR", name="en"), trained_on="msmarco"),
)
"""Their names on the hub were written down without one at hand: give your own copy with `--data` where one has moved."""

PACKAGED = (
    Task(name="rotten_tomatoes", family="sc", max_length=48),
    Task(name="boolq", family="sc", max_length=192),
    Task(name="entity_tweets", family="tc", max_length=64),
    Task(name="disfl_qa", family="qa", max_length=256),
    Task(name="boolq_retrieval", family="ir", max_length=64),
)

TASKS = {task.name: task for task in (*PAPER, *PACKAGED)}


def find_task(name: str) -> Task:
    """A task by its name.

    Raises:
        UserError: there is none of this name.
    """
    if name not in TASKS:
        raise UserError(f"the task is '{name}': allowed are {', '.join(TASKS)}")
    return TASKS[name]
