"""Tests of otalign.attach and of training: models, trainers, several processes."""
