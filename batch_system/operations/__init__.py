"""What a person or a program can ask of the system. It prints nothing and sets up no logging."""
