"""The pages of incidents: the list, the room of one incident, and what a person does about it."""
