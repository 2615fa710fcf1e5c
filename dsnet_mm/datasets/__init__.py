from .few_shot import sample_few_shot

__all__ = ['sample_few_shot']
