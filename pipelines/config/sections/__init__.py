"""The sections of a recipe: each key is a field with a docstring and a type that says its use."""

from .base import Section
from .data import BackboneSection, DataSection
from .jobs import (
    ChainSection,
    EvaluateSection,
    GuidanceSection,
    PrecomputeSection,
    ProbeSection,
    SampleSection,
    StageName,
    TrackingSection,
)
from .networks import (
    AutoencoderSection,
    DecoderSection,
    EncoderSection,
    GeneratorSection,
    GeneratorTraining,
    LossesSection,
    PixelDecoderSection,
    PixelDecoderTraining,
)
from .pool import ActorPoolSection, DecodingPoolSection
from .sweep import AshaSection, ObjectiveSection, SpaceSection, TuneSection
from .text import STORED, TextSection
from .training import TrainingSection

__all__ = [
    "STORED",
    "ActorPoolSection",
    "AshaSection",
    "AutoencoderSection",
    "BackboneSection",
    "ChainSection",
    "DataSection",
    "DecoderSection",
    "DecodingPoolSection",
    "EncoderSection",
    "EvaluateSection",
    "GeneratorSection",
    "GeneratorTraining",
    "GuidanceSection",
    "LossesSection",
    "ObjectiveSection",
    "PixelDecoderSection",
    "PixelDecoderTraining",
    "PrecomputeSection",
    "ProbeSection",
    "SampleSection",
    "Section",
    "SpaceSection",
    "StageName",
    "TextSection",
    "TrackingSection",
    "TrainingSection",
    "TuneSection",
]
