import pytest
from shop.models import Base
from sqlalchemy import MetaData


@pytest.fixture(scope="session")
def batch_metadata() -> MetaData:
    return Base.metadata
