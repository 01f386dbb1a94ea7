"""The whole way from a checkpoint to a compressed model: calibrate, compress, tune, search.

The command line, the transformers plugin and Python all come through here, with the same options. Importing this
package is cheap: what does the work is imported when it starts.
"""

from entrollm.recipes.compress import assist, compress, plan
from entrollm.recipes.options import CompressOptions
from entrollm.recipes.progress import Progress, Stage

__all__ = ["CompressOptions", "Progress", "Stage", "assist", "compress", "plan"]
