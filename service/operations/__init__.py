"""What a person or a program can ask of the system. Prints nothing and sets up no logging."""
