"""The list of incidents, the room of one, and what a person does about it."""
