"""The report: one self-contained page that shows a plan and what it gained and lost, and comparisons kept on disk.

Imports comparison and what lies below.
"""

from difa_compile.files.writing import check_writable
from difa_compile.report.machine import describe_machine, describe_versions
from difa_compile.report.write import write_report

__all__ = ["check_writable", "describe_machine", "describe_versions", "write_report"]
