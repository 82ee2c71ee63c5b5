"""Tasks by name: what a model is trained for."""

from experiments.tasks.classification import Classification
from experiments.tasks.language import Language
from experiments.tasks.questions import Questions

TASKS = {
  "classification": Classification,
  "language": Language,
  "questions": Questions,
}
