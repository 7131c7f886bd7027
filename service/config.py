"""What authors and tests import of the settings."""

from service.settings.reading import Settings as Settings
from service.settings.reading import forget_settings as forget_settings
from service.settings.reading import get_settings as get_settings
from service.settings.reading import refresh_settings as refresh_settings
