"""From a picture and a question to an `Answer`: inference, answer parsing, thinking budget, grounding accuracy."""

from ovisnb.generate.answer import Answer, Box, Point, parse
from ovisnb.generate.budget import ThinkingBudget
from ovisnb.generate.evaluate import grounding_accuracy, label_accuracy, summary, wilson
from ovisnb.generate.inference import Ovis25Inference, grounding_prompt

__all__ = [
    "Answer",
    "Box",
    "Ovis25Inference",
    "Point",
    "ThinkingBudget",
    "grounding_accuracy",
    "grounding_prompt",
    "label_accuracy",
    "parse",
    "summary",
    "wilson",
]
