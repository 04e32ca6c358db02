//! The SDK's client as the local endpoint's embedding model.

use crate::generate::Boxed;
use crate::serve::Embedder;
use crate::{Client, ClientError};

impl Embedder for Client {
    fn limit(&self) -> usize {
        self.planner.max_tokens()
    }

    fn vocab(&self) -> usize {
        self.model.config.vocab_size
    }

    fn width(&self) -> usize {
        self.model.config.hidden_size
    }

    fn tokens(&self, text: &str) -> Result<Vec<u32>, ClientError> {
        let e = self.tokenizer.encode(text, true).map_err(|e| ClientError::Config(format!("tokenizer: {e}")))?;
        Ok(e.get_ids().to_vec())
    }

    fn embed<'a>(&'a self, tokens: &'a [u32]) -> Boxed<'a, Result<Vec<f64>, ClientError>> {
        Box::pin(async { Ok(self.embed_ids(tokens).await?.vector) })
    }
}
