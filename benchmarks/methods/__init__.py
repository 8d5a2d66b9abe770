"""What do the speech methods cost on top of a training step or beside a plain implementation?"""
