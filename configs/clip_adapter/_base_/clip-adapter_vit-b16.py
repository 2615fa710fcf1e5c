_base_ = 'clip-adapter.py'

encoder = dict(model='ViT-B-16-quickgelu', pretrained='openai')
model = dict(backbone=encoder, head=dict(encoder=encoder))
train_dataloader = dict(dataset=dict(features=dict(encoder=encoder)))
val_dataloader = dict(dataset=dict(features=dict(encoder=encoder)))
test_dataloader = dict(dataset=dict(features=dict(encoder=encoder)))
few_shot = encoder
