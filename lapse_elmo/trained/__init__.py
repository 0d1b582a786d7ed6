"""Use trained models: ``lapse_elmo.load(PATH)``, and the classes behind it that bin/embed and bin/score share."""

from lapse_elmo.trained.loading import load
from lapse_elmo.trained.model import LAYERS, TrainedModel
from lapse_elmo.trained.scores import Candidate, SentenceScore, Totals
from lapse_elmo.trained.stored import StoredModel

__all__ = ["LAYERS", "Candidate", "SentenceScore", "StoredModel", "Totals", "TrainedModel", "load"]
