"""What an application or a server may import as `service.app`."""

from service.server.app import Actor as Actor
from service.server.app import Role as Role
from service.server.app import app as app
from service.server.app import create_app as create_app
from service.server.app import lifespan as lifespan
