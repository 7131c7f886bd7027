"""What authors and tests import of the settings."""

from batch_system.settings.reading import Settings as Settings
from batch_system.settings.reading import forget_settings as forget_settings
from batch_system.settings.reading import get_settings as get_settings
from batch_system.settings.reading import refresh_settings as refresh_settings
