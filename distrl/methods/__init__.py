"""The methods: one file a paper, and the union through which a config names one."""

from typing import Annotated, Any

from pydantic import Field, TypeAdapter

from distrl.contract import Catalog, Method
from distrl.methods.cl4srec import CL4SRecConfig
from distrl.methods.gru4rec import GRU4RecConfig
from distrl.methods.laclrec import LACLRecConfig
from distrl.methods.mclrec import MCLRecConfig
from distrl.methods.sasrec import SASRecConfig
from distrl.methods.sracl import SRACLConfig

MethodConfig = Annotated[
    SASRecConfig | CL4SRecConfig | MCLRecConfig | LACLRecConfig | GRU4RecConfig | SRACLConfig,
    Field(discriminator="name"),
]


def parse_method(settings: dict[str, Any]) -> MethodConfig:
    """The config of a method from what `model_dump(mode="json")` wrote.

    Raises:
        pydantic.ValidationError: If the name or a key is unknown, or a value is wrong.
    """
    return TypeAdapter[MethodConfig](MethodConfig).validate_python(settings)


def build(config: MethodConfig, catalog: Catalog) -> Method:
    """The untrained method for one catalog."""
    return config.build(catalog)
