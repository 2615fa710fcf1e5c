"""The few-shot methods. Each file registers the methods of a paper.

The order of the imports is that of ``METHODS``, of the help and of the docs.
"""

# isort: off
from . import zero_shot as zero_shot
from . import linear_probe as linear_probe
from . import clap as clap
from . import lp_plus_plus as lp_plus_plus
from . import gda as gda
from . import ss_text as ss_text
from . import proker as proker
from . import cross_modal as cross_modal
from . import linear_adapter as linear_adapter
from . import clip_adapter as clip_adapter
from . import tip_adapter as tip_adapter
from . import task_res as task_res
from . import coop as coop
from . import transclip as transclip
from .base import METHODS, FewShotData, Method, register_classifier, register_method

__all__ = ['METHODS', 'FewShotData', 'Method', 'register_classifier', 'register_method']
