"""A trained model in its users' hands: ``lapse_elmo.load(PATH)``, and what the programs that use models are made of."""

from lapse_elmo.trained.model import LAYERS, TrainedModel, load
from lapse_elmo.trained.scores import Candidate, SentenceScore, Totals
from lapse_elmo.trained.stored import StoredModel

__all__ = ["LAYERS", "Candidate", "SentenceScore", "StoredModel", "Totals", "TrainedModel", "load"]
