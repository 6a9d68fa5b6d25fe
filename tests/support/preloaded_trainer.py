"""What the server that forks training processes imports: the trainer, and the text it reads.

Each fork would read the standard library for itself, and import what its first command line needs.
"""

import functools
import gc

# Forks import it too.
import launch  # noqa: F401
import small_flavor  # noqa: F401
import torchtitan.train  # noqa: F401

from torchtitan.models.llama3_lighthouse import train  # noqa: F401
from torchtitan.models.llama3_lighthouse.data.text_sources import SOURCES, find_source
from torchtitan.models.llama3_lighthouse.job_config import LighthouseConfigManager

SOURCES["python_stdlib"] = functools.cache(SOURCES["python_stdlib"])
for split, key in (("train", "training"), ("validation", "validation")):
    find_source("python_stdlib", split, None, key)
LighthouseConfigManager().parse_args([])
# Each fork would look for garbage among all of this, and copy the memory that it looks at.
gc.collect()
gc.freeze()
