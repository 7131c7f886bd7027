"""What an application or a server may import as `batch_system.app`."""

from batch_system.server.app import Actor as Actor
from batch_system.server.app import Role as Role
from batch_system.server.app import app as app
from batch_system.server.app import create_app as create_app
from batch_system.server.app import lifespan as lifespan
