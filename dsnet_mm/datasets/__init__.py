from .sampling import sample_few_shot

__all__ = ['sample_few_shot']
