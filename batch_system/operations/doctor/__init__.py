"""The doctor: looks at each part that the service needs, and says what is wrong and what to do."""
