"""Golden files of trainer configs: what each recipe comes to, as text that is committed and reviewed like code.

One line in a test module adopts them, `docs/golden_configs.md` says more:

    test_goldens = golden_tests("my_project.recipes", golden_dir="tests/golden")
"""

from axlearn.common.golden_config._diff import Change as Change
from axlearn.common.golden_config._diff import diff_items as diff_items
from axlearn.common.golden_config._diff import diff_text as diff_text
from axlearn.common.golden_config._diff import diff_texts as diff_texts
from axlearn.common.golden_config._tests import golden_tests as golden_tests
from axlearn.common.golden_config._texts import TEXTS as TEXTS
from axlearn.common.golden_config._texts import config_text as config_text
from axlearn.common.golden_config._texts import init_text as init_text
from axlearn.common.golden_config._texts import regularizer_text as regularizer_text
from axlearn.common.golden_config._texts import with_golden_data_dir as with_golden_data_dir
