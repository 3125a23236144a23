"""Compiling a trainer's step for machines that are not there, and what the compiled program says of running it."""

from axlearn.common.aot_compilation._advice import advise as advise
from axlearn.common.aot_compilation._compile import CompiledStep as CompiledStep
from axlearn.common.aot_compilation._compile import TracedStep as TracedStep
from axlearn.common.aot_compilation._compile import compile_traced_step as compile_traced_step
from axlearn.common.aot_compilation._compile import compile_trainer_step as compile_trainer_step
from axlearn.common.aot_compilation._compile import topology_devices as topology_devices
from axlearn.common.aot_compilation._compile import trace_trainer_step as trace_trainer_step
from axlearn.common.aot_compilation._flops import flops_of as flops_of
from axlearn.common.aot_compilation._making import make_failed_plan as make_failed_plan
from axlearn.common.aot_compilation._making import make_plan as make_plan
from axlearn.common.aot_compilation._picture import plan_picture as plan_picture
from axlearn.common.aot_compilation._plan import AxisTraffic as AxisTraffic
from axlearn.common.aot_compilation._plan import Plan as Plan
from axlearn.common.aot_compilation._plan import PlannedParameter as PlannedParameter
from axlearn.common.aot_compilation._plan import StepSeconds as StepSeconds
from axlearn.common.aot_compilation._program import CompiledFacts as CompiledFacts
from axlearn.common.aot_compilation._program import compiled_facts as compiled_facts
from axlearn.common.aot_compilation._program import read_facts as read_facts
from axlearn.common.aot_compilation._program import write_facts as write_facts
from axlearn.common.aot_compilation._speeds import Speeds as Speeds
from axlearn.common.aot_compilation._speeds import speeds_of as speeds_of
from axlearn.common.aot_compilation._text import plan_text as plan_text
