"""The flavor of the runs of tests. Its import adds it to those of the product."""

from small_model import SIZE

from torchtitan.models.llama3_lighthouse.model.flavors import flavors
from torchtitan.models.llama3_lighthouse.model.model import LighthouseModelArgs

flavors["small"] = LighthouseModelArgs(**SIZE, multiple_of=32, rope_theta=500000)
