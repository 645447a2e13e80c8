"""The OpenAI fine-tuning protocol as a client: any service that speaks it trains, this machine watches."""
