//! Hears of what other servers change: PostgreSQL's notices, and a look every second where these are lost, as a pool of
//! connections loses them.

use std::{future::poll_fn, time::Duration};

use tokio::{
    sync::mpsc::unbounded_channel,
    time::{sleep, timeout},
};
use tokio_postgres::{AsyncMessage, Config};

use super::{CHANNEL, connection::connect};

/// How long a change by others may go unseen.
const POLL: Duration = Duration::from_secs(1);

/// Calls `look` whenever something may have changed, until it returns false.
pub(super) async fn listen(config: &Config, mut look: impl FnMut() -> bool) {
    loop {
        if let Ok((client, mut connection)) = connect(config).await {
            let (sender, mut notices) = unbounded_channel();
            tokio::spawn(async move {
                while let Some(Ok(message)) = poll_fn(|cx| connection.poll_message(cx)).await {
                    if let AsyncMessage::Notification(_) = message
                        && sender.send(()).is_err()
                    {
                        return;
                    }
                }
            });
            if client.batch_execute(&format!("LISTEN {CHANNEL}")).await.is_ok() {
                // A notice, or a second without one; none any more when the connection has ended.
                while !matches!(timeout(POLL, notices.recv()).await, Ok(None)) {
                    while notices.try_recv().is_ok() {}
                    if !look() {
                        return;
                    }
                }
            }
        }
        if !look() {
            return;
        }
        sleep(POLL).await;
    }
}
