"""What is wrong with a trainer config, found out without its machine: built as shapes alone, nothing run or read."""

from axlearn.common.config_check._check import CheckReport as CheckReport
from axlearn.common.config_check._check import check_config as check_config
from axlearn.common.config_check._check import with_findings as with_findings
from axlearn.common.config_check._devices import AbsentDevice as AbsentDevice
from axlearn.common.config_check._devices import devices_of as devices_of
from axlearn.common.config_check._devices import least_devices_for as least_devices_for
from axlearn.common.config_check._findings import Finding as Finding
from axlearn.common.config_check._findings import Severity as Severity
from axlearn.common.config_check._text import fact_lines as fact_lines
from axlearn.common.config_check._text import finding_line as finding_line
from axlearn.common.config_check._text import report_text as report_text
from axlearn.common.config_check._text import summary as summary
