"""The configuration: four tables of values, the built-in recipes; the public scripts' variables."""

from __future__ import annotations

from pgolf.config.keys import NEWTON_SCHULZ as NEWTON_SCHULZ
from pgolf.config.keys import Config as Config
from pgolf.config.keys import EvalConfig as EvalConfig
from pgolf.config.keys import ExportConfig as ExportConfig
from pgolf.config.keys import ModelConfig as ModelConfig
from pgolf.config.keys import TrainConfig as TrainConfig
from pgolf.config.keys import parse_override as parse_override
from pgolf.config.keys import read_polynomials as read_polynomials
from pgolf.config.keys import recipe_policy as recipe_policy
from pgolf.config.keys import recipes as recipes
from pgolf.config.keys import with_younger_keys as with_younger_keys
